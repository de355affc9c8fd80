"""What users read: errors and their exit codes, names of options and fields, values as text, lines of progress."""
