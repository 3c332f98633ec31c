"""What comes in and goes out: images, data sets and files, and checks of them before work begins."""
