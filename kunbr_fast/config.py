from dataclasses import dataclass
@dataclass
class KUnBRConfig: pass
