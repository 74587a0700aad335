"""What a run costs, told without running it: operations counted on the meta device, and how fast a machine is."""
