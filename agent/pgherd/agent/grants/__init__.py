"""The exact GRANTs for each purpose and major version: least privilege, never a superuser."""
