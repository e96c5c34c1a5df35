// Command clock says, for each line that it reads, what time it is and for how long
// it has run.
package main

import (
	"bufio"
	"fmt"
	"os"
	"time"
)

func main() {
	began := time.Now()
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		now := time.Now()
		_, _ = fmt.Fprintln(os.Stdout, now.Unix(), now.Sub(began).Milliseconds(), time.Since(began).Milliseconds())
	}
}
