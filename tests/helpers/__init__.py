"""What the tests, and the tools that are run by hand, share."""
