"""`python -m prefmoe`, and `accelerate launch -m prefmoe` for several processes."""

from prefmoe.cli.app import main

main()
