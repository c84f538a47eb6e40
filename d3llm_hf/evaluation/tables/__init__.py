"""Tables in documents, made from results files, so that no figure is typed by hand."""
