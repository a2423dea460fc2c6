"""What training reaches after each policy, when one budget pays for the policy, too."""
