"""The page that a run leaves: `report.html`, one file that needs no network."""
