"""`ipvrm demo`: the whole method on a task small enough for two CPU cores."""
