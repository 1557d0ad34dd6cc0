"""What the scripts share, and a folder for each stage that they hand work to."""
