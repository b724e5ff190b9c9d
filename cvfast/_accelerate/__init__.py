"""What stands behind cvfast.accelerate: layers swapped in place, chains fused, calls overridden, layers explained."""
