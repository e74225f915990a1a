"""Go's text/template, as far as alert rules use it: parsed once, expanded with functions and data. Pure."""
