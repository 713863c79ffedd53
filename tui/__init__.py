"""The terminal: command line, screens and panels. It reads events and leaves wishes; it never touches a model."""
