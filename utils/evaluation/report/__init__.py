"""The HTML page of an evaluation, `ensembles/report/index.html`.

It is rendered from the evaluation in memory; a page that is missing for a current ranking is rendered from the stored
records (`report_sources`). Its key, a digest of these records, is in its head, and a page with the same key is not
written again. It has no script and a content security policy that forbids requests; every inserted value is made
printable and escaped. Colours are CSS variables, so that figures adapt to light mode, dark mode and print.
"""
