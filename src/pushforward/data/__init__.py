"""Input and output: images, data sets and files, and checks of them before any work begins."""
