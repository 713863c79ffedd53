"""The screens in a browser: a server for this machine alone, and a terminal of its own behind every tab."""
