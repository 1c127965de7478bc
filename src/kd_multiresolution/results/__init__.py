"""What comes of a run: pictures, the page about a test, metrics on raw scores, the paper's protocol and tables."""
