"""Tests of the template: what it bakes, and that what it baked works."""
