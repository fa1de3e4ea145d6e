"""The command line: ``natsl <verb>``. Libraries never import it."""
