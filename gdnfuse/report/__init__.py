"""The report: what the compiler did, as data, as text and as a web page."""
