"""Learned masks: what turns scores into them, what predicts the scores, and what multiplies them in."""
