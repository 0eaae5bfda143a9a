"""From the text of a query to the affinity of its sequence to every expert."""
