"""Training of what follows a cut, one small matter a module."""
