from .models import bundled as bundled
