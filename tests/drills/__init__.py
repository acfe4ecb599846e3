"""Long drills on real services: `make drill`. `make test` leaves them out."""
