"""Is every family of models the same from flash as it is in memory?"""
