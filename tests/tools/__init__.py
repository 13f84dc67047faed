"""Programs to run by hand; the tests run short forms of some."""
