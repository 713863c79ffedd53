"""What the run screen is made of: one panel a file, each a pure drawing of a `RunState`."""
