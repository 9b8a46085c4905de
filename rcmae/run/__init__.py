"""What a run is made of besides its training: its folder, its record, its end."""
