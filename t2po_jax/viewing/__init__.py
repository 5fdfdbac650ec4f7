"""Pages over what runs wrote: the trace viewer and reports."""
