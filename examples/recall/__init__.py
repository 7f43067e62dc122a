"""The weights of the recall proof, trained from nothing; README.md says how and what comes out."""
