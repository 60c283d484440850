"""Both stages together: caches are made where they are missing, then readers are trained on them."""
