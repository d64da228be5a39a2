"""What a run shows while it works, the streams it writes to, and the outputs that it alone holds."""
