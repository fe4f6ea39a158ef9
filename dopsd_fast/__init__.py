"""dopsd_fast: on-policy self-distillation of step-distilled image models."""

__version__ = "0.1.0"
