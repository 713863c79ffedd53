"""The two screens and their dialogs: the wizard that makes a run, and the screen that follows one."""
