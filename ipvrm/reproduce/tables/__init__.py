"""`ipvrm reproduce`: the paper's tables as runs of our commands, our numbers beside the paper's."""
