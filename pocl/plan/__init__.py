"""What a run takes, before weights are loaded: options resolved for this machine, costs counted, --plan printed."""
