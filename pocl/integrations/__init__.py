"""The curriculum in other people's training loops: transformers' Trainer and the trainers of TRL."""
