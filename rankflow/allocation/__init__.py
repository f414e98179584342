"""Pure decisions: which components stay, where new ones are born. Imports no torch."""
