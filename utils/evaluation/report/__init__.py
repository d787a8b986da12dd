"""The page that shows an evaluation, `ensembles/report/index.html`.

It shows what the evaluation holds in memory; one that is missing beside a current ranking is made of the stored records
(`report_sources`). Its key, a digest of the records that it shows, is in its head, and a page with the same key is not
written again. It has no script and a content security policy that forbids requests; every value is made printable and
escaped on its way in. Colours are CSS variables, so that figures follow light, dark and print.
"""
