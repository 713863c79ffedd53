"""The commands of the command line, one file a family; each is imported only when it is called."""
