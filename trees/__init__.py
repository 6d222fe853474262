"""Tree banks as JSON. A module only so that an editable install finds the files as package data."""
