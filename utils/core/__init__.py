"""Configuration, workspace folders, atomic files, locks and worker processes; knows no array and no network."""
