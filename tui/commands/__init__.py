"""The commands of the command line, one file a family; each is imported only when it is called."""

CHILD = "_run"
"""The command by which `--detach` starts its own process: `qlora-tui _run FOLDER`; not for people."""
SCORER = "_score"
"""The command by which the answers of the run in a folder are scored: `qlora-tui _score FOLDER`; not for people either."""
ANSWERER = "_answer"
"""The command by which base and tuned answer held-out prompts: `qlora-tui _answer FOLDER ROWS TOKENS`; nor is this."""
