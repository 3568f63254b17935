"""Run lm-evaluation-harness on torchtune models."""
