"""OpenAI's request bodies and response objects, as far as a masked diffusion model supports them."""
