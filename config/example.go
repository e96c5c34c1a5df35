package config

import (
	"bytes"
	"fmt"

	"github.com/pelletier/go-toml/v2"
)

const exampleHead = `# ImageWolf's settings: every one there is, with its default.
# Printed by 'imagewolf config default'; 'imagewolf config check' tells what is wrong with a file.
# The daemon reads ` + DefaultFile + ` unless --config names another.
# Each may also be given as an environment variable (cluster.join: IMAGEWOLF_CLUSTER_JOIN) and as
# a flag (--cluster-join), where lists are separated by commas. Flags win over the environment, the
# environment over the file. Durations: "300ms", "2s". Sizes: "20GiB" (1024), "20GB" (1000).
`

// Example returns a file that spells out every default, with its meaning, unit
// and limits, made from the same tags that Load reads.
func Example() ([]byte, error) {
	var b bytes.Buffer
	b.WriteString(exampleHead + "\n")
	if err := toml.NewEncoder(&b).SetIndentTables(false).Encode(Default()); err != nil {
		return nil, fmt.Errorf("write the defaults as TOML: %w", err)
	}
	return spaced(b.Bytes()), nil
}

// spaced puts an empty line before every comment that follows a setting.
func spaced(doc []byte) []byte {
	var b bytes.Buffer
	var before byte = '#'
	for line := range bytes.Lines(doc) {
		if line[0] == '#' && before != '#' && before != '\n' {
			b.WriteByte('\n')
		}
		b.Write(line)
		before = line[0]
	}
	return b.Bytes()
}
