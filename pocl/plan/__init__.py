"""What a run takes, before any weight is loaded: options resolved for this machine, costs counted, --plan printed."""
