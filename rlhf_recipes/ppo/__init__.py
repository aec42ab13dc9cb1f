"""PPO with a learned critic, as a thin subclass of TRL's GRPOTrainer: the trainer, its arguments, its arithmetic."""
