"""What every room stands on: errors, files, ranks, the console, passes that resume, signals."""
