"""Options of every command: fields with help texts, and the command line and YAML made of them."""
